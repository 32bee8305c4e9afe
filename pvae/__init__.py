"""Variational autoencoders as probabilistic programs, trained by Pyro's SVI."""
