"""Balances of layers, for tests."""

import torch

from tokenyard import Balance


def balance(counts, probabilities, z_sum=0.0, dropped=0, device="cpu") -> Balance:
    counts = torch.tensor(counts, device=device)
    dropped = torch.tensor(dropped, device=device)
    return Balance(
        counts,
        dropped,
        torch.tensor(probabilities, device=device),
        torch.tensor(float(z_sum), device=device),
    )


def stacked(*balances: Balance) -> Balance:
    """Return the Balance of all layers."""
    return Balance(*map(torch.stack, zip(*balances)))
