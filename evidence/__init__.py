"""Evidence that routing remembers, by training: worlds, arms, measures."""
