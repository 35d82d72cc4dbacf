"""Scoring sets of pictures: where they come from, runs that go on where they stopped, results on disk.

Also how well a reward agrees with people (`agreement`), and a sheet of the best and worst pictures.
"""
