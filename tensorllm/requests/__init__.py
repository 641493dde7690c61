"""What each command may be asked: the fields of its request are its options, said once."""
