"""Exercise 7 (20 minutes): which weights get a gradient? Predict, then check.

The loss of a policy is computed on a batch and sent backward through a model of four layers.
Replace each ? by 1 if these weights have a gradient other than 0, and by 0 otherwise. The check
runs it for you.

    embedding   the table that turns tokens into vectors
    absent      the row of that table for a token that is not in the batch
    attn l      attention of layer l and its norm layer; ffn l: the FFN and its norm layer
    E_u         the unembedding matrix

Each column is a policy: pi_theta is the model's own; Layer 2 is the policy of H^2 (Eq. 6). ATTN 2
is that of A^2, which attention of layer 2 writes, and FFN 3 that of F^3, which the FFN of layer 3
writes (Eq. 7). In the last column embeddings are tied: the embedding and E_u are one matrix. In the
other columns they are two.
"""

import torch

PREDICTION = """
              pi_theta   Layer 2   ATTN 2   FFN 3   Layer 2, tied
embedding        ?          ?        ?        ?           ?
absent           ?          ?        ?        ?           ?
attn 1           ?          ?        ?        ?           ?
ffn 1            ?          ?        ?        ?           ?
attn 2           ?          ?        ?        ?           ?
ffn 2            ?          ?        ?        ?           ?
attn 3           ?          ?        ?        ?           ?
ffn 3            ?          ?        ?        ?           ?
attn 4           ?          ?        ?        ?           ?
ffn 4            ?          ?        ?        ?           ?
final norm       ?          ?        ?        ?           ?
E_u              ?          ?        ?        ?           ?
"""
