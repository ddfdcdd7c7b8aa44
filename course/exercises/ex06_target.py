"""Exercise 6 (10 minutes): which layer does phase 1 train?

dH_FFN^l > 0 means that the FFN of layer l raises entropy: it opens up possibilities. dH_FFN^l < 0
means that it narrows them down. The paper trains the last layer that still explores: the *last*
layer *below the top* whose FFN raises entropy. A change of exactly 0 does not raise it.

dH_mlp: dH_FFN of layers 1..L, a list of L numbers. Return the layer, an integer in 1..L-1. If there
is no such layer, the paper has no rule: raise ValueError, so that no layer is trained by accident.

By hand first, for L = 6:   1.22  0.14  0.48  0.01  -0.36  -0.55      (the toy's base model)
                            1.22  0.14  -0.2  0.01  -0.36   0.55
"""


def target_layer(dH_mlp):
    raise NotImplementedError
