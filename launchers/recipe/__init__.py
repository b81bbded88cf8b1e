"""Recipes: look at a person's images and write the configs of the three stages, with the reasons as comments.

- `look`: what the images are (torch-free)
- `neighbours`: whether a mirrored image still belongs to its class, and whether its colours tell it (torch-free)
- `networks`: the model, the stages that it needs and its learning rates, as documented functions (torch-free)
- `rules`: every other number of a recipe as a documented function (torch-free)
- `timing`: how long a step takes on this machine, and what fits into its memory
- `text`: the files, and whether a person has edited them (torch-free)
- `write`: all of it
"""
