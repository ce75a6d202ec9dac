"""Per-sample quantities of any PyTorch model: gradients, norms, Grams, moments, exact and at about the price of one backward pass."""
