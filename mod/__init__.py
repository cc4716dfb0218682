"""VideoLLM-MoD from scratch: a streaming video LLM whose vision tokens skip layers (arXiv 2408.16730).

Read the files in this order, each holds one idea:

    config    every size and switch, with named presets
    block     attention and the transformer block, shared by vision and language
    vit       a frame becomes one CLS token and a grid of patch tokens
    router    which vision tokens of a frame go through a layer, and with what weight
    window    what an endless stream forgets, and where the rest then stands
    cache     the streaming memory: keys and values, another number of them in every layer
    decoder   the Llama-type decoder; MoDBlock wraps the dense block
    layout    a conversation about a video as one row of tokens and labels
    videollm  vision encoder + connector + decoder, and the loss
    data      the synthetic video stream
    metrics   what "good" means: the base paper's metrics and plain accuracies
    stream    frames arrive one by one, answers leave one by one
    evaluate  a model over many clips: teacher-forced, and free-running through a stream
    optim     AdamW, and Muon for the matrices
    parallel  several processes, one training run
    checkpoint  files that survive a crash, and runs that continue bit for bit
    train     the training loop
    live      frames and questions with their times, in order; saved and restored

Size letters, the same in every file (lower case inside einops patterns):

    B  streams in a batch            N  tokens of one frame (1 CLS + h*w patches)
    T  tokens of the longest stream  F  frames, of all streams of the batch together
    K  tokens that enter a layer     S  keys that a query may look at (cached + new)
    H  query heads                   G  key/value heads
    E  width of one head             D  width of a token (in vit.py: of the encoder)
    V  words in the vocabulary       P  patches of one frame in the vision encoder
"""
