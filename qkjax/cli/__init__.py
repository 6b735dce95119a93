"""What every command shares: flags, config words, exit codes, the process's environment."""
