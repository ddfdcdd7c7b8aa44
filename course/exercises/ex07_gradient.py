"""Exercise 7 (20 minutes): who gets a gradient? Predict, then check.

One backward of the loss of some policy on a batch, in a model of four layers. Replace each ? by 1
where the weights have a gradient other than 0, else by 0. Do not run it first: the check does that.

    embedding   the table that tokens enter by; "absent": its row of a token not in the batch
    attn l      attention of layer l and the norm before it; ffn l: the FFN and its norm
    E_u         the unembedding matrix

Policies (the columns): pi_theta is the model's own; Layer 2 that of H^2 (Eq. 6); ATTN 2 that of
what attention of layer 2 writes, FFN 3 that of what the FFN of layer 3 writes (Eq. 7). In the last
column embeddings are tied: one matrix is the embedding and E_u. In the others they are two.
"""

import torch  # noqa: F401

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
