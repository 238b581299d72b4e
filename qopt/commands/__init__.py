"""The subcommands of `qopt`, one file each. They import torch and the like late, so that `--help` is quick."""
