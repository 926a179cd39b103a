"""Formats of model weights, as far as cutting needs them: where tensors lie in a file, what they are called and made of."""
