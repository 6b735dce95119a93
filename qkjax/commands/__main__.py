"""`python -m qkjax.commands VERB`: the console command `qkjax`, where only python is available."""

from qkjax import commands

if __name__ == "__main__":
    commands.main()
