"""The destination's half of memory without waiting: a container runs while its memory is mapped in behind it.

`images` turns the images of a dump that wrote no pages into images for a lazy restore, `python -m migrator.fill`
(started by `launch`) answers the restored processes' page faults from a page store on this host and fills in everything
else.

The page store is a folder on tmpfs with one sparse file for each process, `mem-<pid in the container's pid namespace>`,
in which the offset is the virtual address. Holes are pages of zeros. It is given back while it is filled in.

Knows nothing of the agent, of migrations or of the network.
"""
