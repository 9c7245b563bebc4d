"""The best sizes of blocks of each chip by its compiler's schedule, for bfloat16 and heads of 128.

Written by python -m benchmarks.tpu_autotune; `tuning.py` says how they are used.
"""

ANCHORS = {  # queries, keys, queries and keys at once, parts ahead
    "tpu7x": (2048, 2048, 128, 512, 2),
    "v4": (2048, 2048, 512, 256, 0),
    "v5e": (2048, 2048, 128, 512, 2),
    "v5p": (2048, 2048, 128, 512, 2),
    "v6e": (2048, 2048, 128, 512, 2),
}

PICKS = {  # the same, and keys at once of short blocks; for 1280
    "tpu7x": (1024, 1408, 256, 128, 4, 256),
    "v4": (1024, 1408, 256, 128, 4, 128),
    "v5e": (1024, 1408, 256, 128, 3, 256),
    "v5p": (1024, 1408, 256, 128, 4, 256),
    "v6e": (1024, 1408, 256, 128, 4, 256),
}

ANCHOR_GRADIENTS = {  # queries, keys, keys at once, transposed
    "tpu7x": (1024, 2048, 512, True),
    "v4": (1024, 2048, 1024, False),
    "v5e": (1024, 2048, 1024, False),
    "v5p": (1024, 2048, 1024, False),
    "v6e": (1024, 2048, 512, True),
}

PICK_GRADIENTS = {  # the same; for chunks of 1280
    "tpu7x": (1024, 1536, 512, True),
    "v4": (512, 1408, 128, False),
    "v5e": (1024, 1408, 128, False),
    "v5p": (1024, 1408, 128, False),
    "v6e": (1024, 1536, 512, True),
}
