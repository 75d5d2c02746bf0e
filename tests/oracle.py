"""docs/method.md section 1 and section 2 written down once more, in float64 and with explicit loops, from raw rows.

Shares no code with the package. Shapes as there: N rows, D features, O outputs, K directions.
"""

import itertools

import numpy as np
import torch


def conv_rows(x, conv):
    """Patches of every output position, one by one, zero padding: (B * L * groups, D)."""
    x = x.double()
    pad = conv.padding
    if pad == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in pad]
    batch, channels, height, width = x.shape
    canvas = torch.zeros(batch, channels, height + sum(pads[0]), width + sum(pads[1]), dtype=torch.float64)
    canvas[:, :, pads[0][0] : pads[0][0] + height, pads[1][0] : pads[1][0] + width] = x
    per_group = channels // conv.groups
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    rows = []
    for image in canvas:
        for top in range(0, canvas.shape[2] - dh * (kh - 1), sh):
            for left in range(0, canvas.shape[3] - dw * (kw - 1), sw):
                for group in range(conv.groups):
                    block = image[group * per_group : (group + 1) * per_group]
                    rows.append(block[:, top : top + dh * kh : dh, left : left + dw * kw : dw].reshape(-1)[None])
    return torch.cat(rows)


def net_rows(net, batches, targets):
    """Raw inputs of every map, as docs/method.md defines them."""
    rows, handles = {name: [] for name in targets}, []
    for name in targets:
        module = net.get_submodule(name)

        def hook(module, args, name=name):
            x = args[0].detach()
            rows[name].append(conv_rows(x, module) if isinstance(module, torch.nn.Conv2d) else x.double())

        handles.append(module.register_forward_pre_hook(hook))
    net.eval()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


class Oracle:
    """Region of forget rows, and the loss of a drift; options by the names of docs/method.md."""

    def __init__(self, forget, retain=None, reduced_dim=4, lower_percentile=0.05, upper_percentile=0.95,
                 infinity_scale=20.0, use_actual_bounds=False, decomposition="svd", residual_weighting="per_sample",
                 residual_source="forget", **options):  # fmt: skip
        self.options = options
        x = forget.double()
        n, d = x.shape
        self.mean = x.mean(0)
        if decomposition == "none":
            self.basis = torch.eye(d, dtype=torch.float64)
            self.residual = torch.zeros(d, d, dtype=torch.float64)
            self.multiplier = 0.0
        else:
            _, _, vt = torch.linalg.svd(x - self.mean, full_matrices=False)
            basis = vt[:reduced_dim].T
            for column in range(reduced_dim):
                if basis[basis[:, column].abs().argmax(), column] < 0:
                    basis[:, column] = -basis[:, column]
            self.basis = basis
            rows = {"forget": x, "retain": retain, "both": None if retain is None else torch.cat([x, retain.double()])}
            chosen = rows[residual_source].double()
            outside = (chosen - chosen.mean(0)) @ (torch.eye(d, dtype=torch.float64) - basis @ basis.T)
            self.residual = outside.T @ outside / len(chosen)
            self.multiplier = 1.0
            if residual_weighting == "singular_values":
                left = min(n, d) - reduced_dim
                self.multiplier = n / left if left > 0 else 0.0
        z = (x - self.mean) @ self.basis
        self.z_lower = torch.from_numpy(np.quantile(z.numpy(), lower_percentile, axis=0))
        self.z_upper = torch.from_numpy(np.quantile(z.numpy(), upper_percentile, axis=0))
        if use_actual_bounds:
            both = torch.cat([z, (retain.double() - self.mean) @ self.basis])
            self.outer_lower, self.outer_upper = both.min(0).values, both.max(0).values
        else:
            self.outer_lower, self.outer_upper = self.z_lower - infinity_scale, self.z_upper + infinity_scale

    def use_bounds_of(self, region):
        """Take the percentiles of a fitted region (they are streamed, hence near but not equal to the exact ones)."""
        for name in ("z_lower", "z_upper", "outer_lower", "outer_upper"):
            setattr(self, name, getattr(region, name).double())
        return self

    def boxes(self):
        """The boxes whose T is averaged or summed: (list of (lower, upper), divisor)."""
        kind = self.options.get("region", "two_corner")
        if kind == "two_corner":
            return [(self.outer_lower, self.z_lower), (self.z_upper, self.outer_upper)], 1
        if kind == "envelope":
            return [(self.outer_lower, self.outer_upper)], 1
        slabs = []
        for k in range(len(self.z_lower)):
            low_upper, high_lower = self.outer_upper.clone(), self.outer_lower.clone()
            low_upper[k], high_lower[k] = self.z_lower[k], self.z_upper[k]
            slabs += [(self.outer_lower, low_upper), (high_lower, self.outer_upper)]
        return slabs, len(slabs)

    def loss(self, delta, delta_bias=None):
        """L_map of docs/method.md section 2."""
        delta = delta.double()
        outputs = len(delta)
        bias = torch.zeros(outputs, dtype=torch.float64) if delta_bias is None else delta_bias.double()
        total = ((delta @ self.mean + bias) ** 2).mean()
        total = total + self.multiplier * torch.trace(delta @ self.residual @ delta.T) / outputs
        if not self.options.get("interval", True) or self.options.get("remove_top_directions", False):
            return total
        d = delta @ self.basis
        shift = bias if self.options.get("include_bias_drift", False) else torch.zeros_like(bias)
        plus, minus = d.clamp(min=0), (-d).clamp(min=0)
        boxes, divisor = self.boxes()
        for lower, upper in boxes:
            low, high = plus @ lower - minus @ upper + shift, plus @ upper - minus @ lower + shift
            total = total + (low**2 + high**2).mean() / divisor
        return total


def corners(lower, upper):
    """All vertices of a box, for small K."""
    return torch.tensor(
        list(itertools.product(*zip(lower.tolist(), upper.tolist(), strict=True))), dtype=torch.float64
    )
