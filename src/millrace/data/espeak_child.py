"""A program by itself: speaks what standard input asks for with espeak-ng, and writes the samples to standard output.

espeak-ng keeps global state, is not safe in threads, and draws random numbers, which it seeds by the clock: a fresh
process that seeds them anew and says the same things in the same order gives the same samples.
Nothing but the standard library is imported, so that it starts at once. In: JSON {"library", "data", "utterances":
[[text, voice, words per minute, pitch], …]}. Out: the sample rate (int32), then of each utterance the number of
samples (int32) and the samples (int16), all in the machine's byte order.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys

_SYNCHRONOUS, _UTF8, _RATE, _PITCH = 2, 1, 1, 3  # names of speak_lib.h, without their prefixes
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main() -> int:
    """Exit status: 1 with a reason on standard error when the library refuses something."""
    asked = json.load(sys.stdin)
    espeak = ctypes.CDLL(asked["library"])
    rate_hz = espeak.espeak_Initialize(_SYNCHRONOUS, 0, asked["data"].encode(), 0)
    if rate_hz <= 0:
        print(f"espeak_Initialize returned {rate_hz} for the data in {asked['data']}", file=sys.stderr)
        return 1
    heard = bytearray()

    def take(samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if count > 0:
            heard.extend(ctypes.string_at(samples, 2 * count))
        return 0

    espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
    callback = _CALLBACK(take)  # kept in a name: the library holds only its address
    espeak.espeak_SetSynthCallback(callback)
    out = sys.stdout.buffer
    out.write(struct.pack("=i", rate_hz))
    for text, voice, words_per_minute, pitch in asked["utterances"]:
        heard.clear()
        spoken = text.encode()
        refused = (
            espeak.espeak_SetVoiceByName(voice.encode())
            or espeak.espeak_SetParameter(_RATE, words_per_minute, 0)
            or espeak.espeak_SetParameter(_PITCH, pitch, 0)
            or espeak.espeak_Synth(spoken, len(spoken) + 1, 0, 1, 0, _UTF8, None, None)
        )
        if refused:
            print(f"it cannot say {text!r} in the voice {voice!r} (status {refused})", file=sys.stderr)
            return 1
        out.write(struct.pack("=i", len(heard) // 2))
        out.write(heard)
    return 0


if __name__ == "__main__":
    sys.exit(main())
