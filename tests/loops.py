"""Training as everyone writes it."""

from torch.nn import functional as F


def fit(net, optimizer, batches):
    """Train on every batch once; return the losses."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
