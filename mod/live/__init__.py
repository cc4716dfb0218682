"""Streams as they are watched: without end, in real time, several at once, saved, and shown.

Read the files in this order:

    settings   what can be set about a live stream
    window     a cache that forgets old frames, exactly as its rule says
    live       frames and questions with their times, one stream or several together
    saved      a live stream in a file, from which it goes on bit for bit
    costs      FLOPs, entries, and the window that fits into a memory budget
    record     what happened, frame by frame: everything below draws from it
    show       a line for each thing said, and a summary
    draw       a frame in the terminal
    picture    a stream as one picture
    page       a stream as a web page, made from page.html
    calibrate  which threshold to speak at
    watch      the flags of all of this: `stream_tiny.py` calls it when one of them is given

Everything here imports the core and is never imported by it.
"""
