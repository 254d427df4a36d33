"""The tabs of the page: each file has ID, TITLE, ORDER, build(desk) and wire(desk); found by walking this folder.

build makes the components and puts what other tabs need into desk.places; wire connects them when all tabs are made.
"""
