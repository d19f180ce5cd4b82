"""What a program will need of chips that are not at hand: compiled ahead of time, and read."""
