"""`python -m qkjax.commands VERB`: the console command `qkjax`, where only python is at hand."""

from qkjax import commands

if __name__ == "__main__":
    commands.main()
