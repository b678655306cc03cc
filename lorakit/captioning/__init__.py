"""Writing and editing the caption files of a folder: `lorakit caption`."""
