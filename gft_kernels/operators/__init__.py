"""The losses as torch operators: what torch.compile sees as one node, with the gradient ready when the loss is."""
