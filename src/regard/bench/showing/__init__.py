"""What an atlas is made of: a model opened by what it is, and data of its kind as passages.

    exhibit = open_model("path/to/model")          # transformers, timm or diffusers
    exhibit.passages([Source(path=Path("text.txt"))], examples=4, length=512)

A kind of data is a file here: text, pictures, speech, pictures with text, noise.
"""
