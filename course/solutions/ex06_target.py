"""Solution 6. Both give layer 4. In the second, layer 3 lowers entropy but layer 4 raises it again,
and the top layer does not count: if it were trained, no layer above could build on it."""


def target_layer(dH_mlp):
    for l in range(len(dH_mlp) - 1, 0, -1):  # from layer L - 1 down
        if dH_mlp[l - 1] > 0:
            return l
    raise ValueError(f"no FFN below the top raises entropy: {dH_mlp}")
