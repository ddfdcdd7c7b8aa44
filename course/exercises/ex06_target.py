"""Exercise 6 (10 minutes): at which layer does phase 1 start?

dH_FFN^l above 0 means that the FFN of layer l raises entropy: it opens up possibilities. Below 0 it
narrows them down. The paper trains the end of exploration first: the *last* layer *below the top*
whose FFN raises entropy. 0 is not above 0.

d_mlp: dH_FFN of layers 1..L, a list of L numbers. Return the layer, an int in 1..L-1. Where there
is no such layer the paper has no rule: raise ValueError, so that none is trained by accident.

By hand first, for L = 6:   1.22  0.14  0.48  0.01  -0.36  -0.55      (the toy's base model)
                            1.22  0.14  -0.2  0.01  -0.36   0.55
"""


def target_layer(d_mlp):
    raise NotImplementedError
