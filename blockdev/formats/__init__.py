"""Disk images as people bring them, read without trusting them: raw disks, ploop folders, qcow2; partitions and file
systems inside. Everything here only reads, and needs no root; what is damaged or hostile raises FormatError.
"""
