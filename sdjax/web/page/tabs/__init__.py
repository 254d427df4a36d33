"""The tabs of the page: each file has ID, TITLE, ORDER, build(desk) and wire(desk); found by walking this folder.

build makes the components and offers some to other tabs in desk.places; wire connects them once all tabs are built.
"""
