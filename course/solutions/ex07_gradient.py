"""Solution 7. The gradient starts at the vector that is unembedded and runs back through everything
that this vector was computed from. E_u also gets a gradient, because it is a factor of the logits.
What comes later in the forward pass gets none: the layers above, and for ATTN 2 also the FFN of its
own layer. Only pi_theta uses the final norm.

The embedding row of an absent token is not used, so its gradient is 0. The token's row of E_u does
have a gradient, because the softmax lowers all tokens that were not chosen. If embeddings are tied,
both rows are the same one: then the embedding of every token moves, also in phase 1."""

PREDICTION = """
              pi_theta   Layer 2   ATTN 2   FFN 3   Layer 2, tied
embedding        1          1        1        1           1
absent           0          0        0        0           1
attn 1           1          1        1        1           1
ffn 1            1          1        1        1           1
attn 2           1          1        1        1           1
ffn 2            1          1        0        1           1
attn 3           1          0        0        1           0
ffn 3            1          0        0        1           0
attn 4           1          0        0        0           0
ffn 4            1          0        0        0           0
final norm       1          0        0        0           0
E_u              1          1        1        1           1
"""
