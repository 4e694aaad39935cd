"""Emoji world: 64x64 clips of things (a cat, a car, a rocket) that move over meadows and beaches, with exact masks.

`sprites` holds the pictures of the things, `backdrops` draws what is behind them, `world` renders scenes and writes
and parses their captions, `variety` samples scenes, `instruments` says without the truth what a clip shows.
"""
