"""Muon (Jordan 2024): an update is the momentum of a matrix, with all its singular values near 1."""

import torch

MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for param groups with a key "muon". Their parameters are matrices [rows, cols].

    muon: dtype of the iteration. torch.bfloat16 is enough, but slow where a device only emulates it.

    Both have decoupled weight decay. Muon's updates are as large as AdamW's (Moonlight, arXiv 2502.16982);
    twice AdamW's learning rate was best in this project. fused=True: a step where the attribute found_inf, a
    tensor, is 1 changes nothing, as with GradScaler.
    """

    @torch.no_grad()
    def step(self):
        found_inf = getattr(self, "found_inf", torch.zeros(()))
        for group in self.param_groups:
            if not group.get("muon"):
                continue
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # AdamW expects a "step" in a checkpoint
                    state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))
                momentum = state["momentum"]
                skip = found_inf.to(p.device) > 0
                lr = torch.where(skip, 0, group["lr"])
                grad = torch.where(skip, momentum, p.grad)  # then the momentum stays as it is
                momentum.lerp_(grad, 1 - MOMENTUM)
                nesterov = grad.lerp(momentum, MOMENTUM)
                update = orthogonalize(nesterov.to(group["muon"]))
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(update * (lr * 0.2 * max(p.shape) ** 0.5))
                p.grad = None  # AdamW leaves it out
        super().step()


def orthogonalize(x):
    """A matrix with the singular vectors of x [rows, cols], and singular values near 1, from 0.5 to 1.5.

    Five steps of a Newton-Schulz iteration: an odd polynomial of x is that polynomial of its singular values.
    The coefficients are Jordan's. Singular values below 0.1 % of the norm stay smaller.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T).T
    x = x / x.norm().clamp(min=1e-20)
    for _ in range(5):
        gram = x @ x.T
        quintic = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, quintic, x, beta=3.4445)
    return x
