"""Engines that packedcomm brings weights into, each in a package of its own."""
