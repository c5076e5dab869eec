"""The systems that MoME is compared with, each a network, its loss and its way to a mask."""
