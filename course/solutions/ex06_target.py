"""Solution 6. It is layer 4 in both: the dip at layer 3 does not end exploration, and the top layer
does not count, since training it would leave nothing above to build on it."""


def target_layer(d_mlp):
    for l in range(len(d_mlp) - 1, 0, -1):  # from layer L - 1 down
        if d_mlp[l - 1] > 0:
            return l
    raise ValueError(f"no FFN below the top raises entropy: {d_mlp}")
