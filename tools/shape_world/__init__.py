"""Shape world: 64x64 clips of coloured shapes moving over coloured backgrounds, with masks and captions.

The embedded tiny model was trained on this world, so its edits can be measured without human eyes: `world`
makes clips, `clips` reads the delivered ones, `instruments` measures an edited clip, `statistics` compares
two methods, `media` shows them.
"""
