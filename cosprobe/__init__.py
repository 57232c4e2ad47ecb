"""Where, inside a video diffusion transformer, does the answer become decodable?

The packages, in the order of the method; each `__init__` says what happens there:
  tasks         problems with exact labels, and parsers that read answers from video
  config        settings of both commands
  models        frozen diffusers pipelines
  activations   what happens inside blocks while a pipeline samples: captured, edited, stored
  probes        every probe of a grid fitted at once, and kept
  evaluation    accuracy, baselines, intervals, significance; checks
  reporting     what a person sees
  early_exit    answers before the video is finished, at a stated risk
  ensembles     several noise seeds against one run, at equal compute
  causal        edits of a run while it is sampled, with controls: is a state used?
  behaviour     exploration, commitment, corrections, memory and roles of layers, as numbers
  minimodel     how the model in the package was trained
  api           the same steps in a notebook, on your own images and labels

The public names are imported on first access; `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
