"""Images in: folders in MVTec layout, arrays, idx files and the built-in digits."""
