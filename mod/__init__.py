"""VideoLLM-MoD from scratch: a streaming video LLM whose vision tokens skip layers (arXiv 2408.16730).

Read the files in this order; each holds one idea:

    config    every size and switch
    layers    attention and the transformer block, shared by vision and language
    vit       a frame becomes one CLS token and a grid of patch tokens
    layout    a conversation about a video as one row of tokens and labels, and the plan of where they lie
    router    which vision tokens of a frame go through a layer, and with what weight
    decoder   the Llama-type decoder; MoDBlock wraps the dense block
    cache     the streaming memory: keys and values, a different number of them in each layer
    videollm  vision encoder + connector + decoder, and the loss
    data      the synthetic video stream
    stream    frames arrive one by one, answers leave one by one
    evaluate  what "good" means, teacher-forced and free-running
    optim     AdamW, and Muon for the matrices
    run       the flags and files of a run
    train     the training loop

What stretches the method lies in folders of its own, and nothing above imports them unless a flag asks:
live (endless and timed streams, pages), real (checkpoints and videos), related (the field's methods), study (tables),
and parallel (several processes).

Size letters, the same in every file (lower case inside einops patterns):

    B  streams in a batch            N  tokens of one frame (1 CLS + h*w patches)
    T  tokens of the longest stream  F  frames, of all streams of the batch together
    K  tokens that enter a layer     k  tokens of one frame that enter a layer
    S  keys that a query may look at (cached + new)
    H  query heads                   G  key/value heads
    E  width of one head             D  width of a token (in vit.py: of the encoder)
    V  words in the vocabulary       P  patches of one frame in the vision encoder
    L  tokens that have a label
"""
