"""What a run will need, before there is anything to run it on: by arithmetic, and by the compiler."""
