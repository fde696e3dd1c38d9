"""torch.library operators of flexmsa."""
