"""One file a kind of autoencoder: how its parts make a program."""
