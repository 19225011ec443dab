"""Decodes all image files once: to find those that are broken, and to keep the others decoded."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

from keras_dinov3.image_files import TarredFile, load_image, reason


def read_images(files, image_size, cache, num_threads, verbose):
    """Decodes all files, in parallel.

    Args:
        files: List of paths or `TarredFile`s.
        image_size: `(height, width)` in pixels.
        cache: Whether to keep the images, or the path of a file to keep them in.
        num_threads: Int. Threads that decode. `None`: one per CPU core.
        verbose: 1 shows a progress bar, 0 does not.

    Returns:
        uint8 array `(n, height, width, 3)` of the files that can be read, or `None` if they are
        not to be kept; and a dict from the others to the reasons.
    """
    if isinstance(cache, (bool, np.bool_)):
        images = np.empty((len(files), *image_size, 3), "uint8") if cache else None
        count, unreadable = decode(files, image_size, images, num_threads, verbose)
        return (images[:count] if cache else None), unreadable
    path = os.fspath(cache)
    described, known = f"{path}.json", fingerprint(files, image_size)
    check_path(path, described)
    content = read_json(described)
    if not os.path.exists(path) or content["fingerprint"] != known:
        shape, parts = (len(files), *image_size, 3), [f"{path}.part", f"{described}.part"]
        images = np.lib.format.open_memmap(parts[0], "w+", "uint8", shape)
        count, unreadable = decode(files, image_size, images, num_threads, verbose)
        images.flush()
        content = {"fingerprint": known, "count": count, "unreadable": unreadable}
        with open(parts[1], "w") as file:
            json.dump(content, file)
        if os.path.exists(described):
            os.remove(described)  # never beside the images of others
        os.replace(parts[0], path)
        os.replace(parts[1], described)
    return np.load(path, mmap_mode="r")[: content["count"]], content["unreadable"]


def decode(files, image_size, images, num_threads, verbose):
    """Writes the images into an array if there is one; how many, and what went wrong."""

    def read(path):
        try:
            return load_image(path, image_size), None
        except Exception as error:  # Pillow's decoders raise nearly every type
            return None, reason(error, path)

    count, unreadable = 0, {}
    progress = keras.utils.Progbar(len(files), verbose=verbose, interval=1.0, unit_name="image")
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        for start in range(0, len(files), 256):  # blocks, since `map` queues all it is given
            block = files[start : start + 256]
            for path, (image, error) in zip(block, pool.map(read, block), strict=True):
                if error:
                    unreadable[path] = error
                    continue
                if images is not None:
                    images[count] = image
                count += 1
            progress.update(start + len(block))
    return count, unreadable


def fingerprint(files, image_size):
    """What changes whenever the decoded images might: names, sizes and times of the files."""
    digest, times = hashlib.sha256(repr(tuple(image_size)).encode()), {}
    for file in files:
        path = file.archive if isinstance(file, TarredFile) else file
        if path not in times:
            times[path] = size_and_time(path)
        place = (file.start, file.length) if isinstance(file, TarredFile) else ()
        digest.update(repr((str(file), times[path], place)).encode())
    return digest.hexdigest()


def size_and_time(path):
    try:
        status = os.stat(path)
    except OSError:  # a link to nowhere
        return None
    return status.st_size, status.st_mtime_ns


def check_path(path, described):
    if not path.endswith(".npy"):
        raise ValueError(
            "`cache` must be True, False, or the path of a file ending in .npy. "
            f"Received: cache={path!r}."
        )
    if os.path.exists(path) and not os.path.exists(described):
        raise ValueError(
            f"`cache` must name a new file, or one made as a cache, which {described} would "
            f"describe. Received: {path}, which exists. Remove it, or choose another name."
        )


def read_json(path):
    """The content of a file, or `None` if there is no such file."""
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        return None
