"""The frozen public models, and how their files are found, read and checked."""
