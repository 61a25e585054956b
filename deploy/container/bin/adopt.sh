# Sourced with `root` set to the folder of quickthaw's environment, which may have been copied from another image.
#
# `without_shims` sets PATH as it was without the shims, so that nothing below quickthaw comes back to them. `usable` returns 0 if the
# environment works in this container, after linking it to a Python of this container where it must; else it sets `why`.

without_shims() {
    kept='' rest=$PATH:
    while [ -n "$rest" ]; do
        folder=${rest%%:*}
        rest=${rest#*:}
        # also those of another copy: two that call each other would go on for ever
        { [ -e "$folder/shim" ] && [ -e "$folder/../bin/adopt.sh" ]; } || kept=$kept${kept:+:}${folder:-.}
    done
    PATH=$kept
}

# Set `stamp`: which Python the environment uses here.
current() {
    real=$(readlink -f "$root/bin/python") && [ -x "$real" ] && stamp="$real $(stat -c '%s %Y' "$real")"
}

remember() { current && echo "$stamp" >"$root/.verified.$$" && mv -f "$root/.verified.$$" "$root/.verified"; }

# Import what a launch needs, compiled modules too: their C library may be newer than this container's.
verify() {
    why=$("$root/bin/python" -P -c 'import plugin.launch, plugin.runtime.run, blake3, httptools, numpy, uvloop, xxhash, zstandard' 2>&1) && return
    why="quickthaw does not start with $real: $(printf '%s' "$why" | tail -n 1)"
    return 1
}

usable() {
    real=''
    if current && [ -r "$root/.verified" ] && read -r known <"$root/.verified" && [ "$known" = "$stamp" ]; then
        return 0
    fi
    if [ -z "$real" ] || [ ! -x "$real" ] || [ ! -d "$root/lib/$(version_of "$real")" ]; then
        link_python || return 1
    fi
    verify || return 1
    remember 2>/dev/null || : # a folder that cannot be written is verified at every start
}

version_of() { "$1" -I -S -c 'import sys; print("python%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Link the first Python of this container for which the environment has packages.
link_python() {
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        version=$(version_of "$candidate") && [ -d "$root/lib/$version" ] || continue
        real=$("$candidate" -I -c 'import os, sys; print(os.path.realpath(sys._base_executable))') || continue
        if ! {
            printf 'home = %s\ninclude-system-site-packages = false\n' "${real%/*}" >"$root/pyvenv.cfg.$$" &&
                mv -f "$root/pyvenv.cfg.$$" "$root/pyvenv.cfg" &&
                ln -sfn "$real" "$root/bin/python.$$" && mv -fT "$root/bin/python.$$" "$root/bin/python"
        } 2>/dev/null; then
            why="$root cannot be written, so it cannot be linked to this container's $version"
            return 1
        fi
        return
    done
    why="this container's PATH has none of the versions of Python that $root has packages for: $(cd "$root/lib" && echo python3*)"
    return 1
}
