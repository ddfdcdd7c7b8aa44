"""Solution 7. A gradient enters at the vector that is unembedded and runs down through all that
made it. E_u gets one as well, for it is a factor of the logits. What comes later in the forward
pass is not in the graph: higher layers, and for ATTN 2 also the FFN of its own layer. Only pi_theta
has the final norm.

A token that is not in the batch never enters, so its row of the embedding gets 0. Its row of E_u
does get a gradient, since the softmax pushes down all tokens that were not chosen. Tied, these two
rows are one: in phase 1, too, every token's embedding moves."""

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
