"""Files that are cut short, malformed, large, oddly encoded, or no files at all."""

import gzip
import json
from pathlib import Path

import pyarrow as pa

from hostile_making import (
    GOOD,
    LARGE,
    MANY,
    WIDE,
    Case,
    chats,
    columns,
    csv,
    fifo,
    file,
    half_a_parquet_file,
    hole_of_a_terabyte,
    jsonl,
    link,
    listening_socket,
    made,
    nested,
    pair,
    parquet,
    turns,
    zipped,
)

CUT_SHORT_OR_MALFORMED = [
    Case("an empty file", file("train.csv", ""), "train.csv: the file is empty"),
    Case("white space alone", file("train.jsonl", " \n\t\n"), "train.jsonl: the file is empty"),
    Case("csv cut inside of quotes", csv("a,b", 'c,"d'), "train.csv, line 3: a quote opens in this record"),
    Case("csv cut before the last cell", csv("a,b", "c"), "train.csv, line 3, row 2: expected 2 cells"),
    Case("csv with a comma that is not quoted", csv("a,b, c"), "train.csv, line 2, row 1: expected 2 cells"),
    Case("csv with single quotes", csv("'a, b','c'"), "train.csv, line 2, row 1: expected 2 cells"),
    Case("csv with text behind a quote", csv('"a" b,c'), "train.csv, line 2: malformed at line 2"),
    Case("csv with backslashes before quotes", csv(r'"a \"b\"",c'), "train.csv, line 2: malformed at line 2"),
    Case("csv with semicolons", csv("a;b", header="instruction;output"), kept=1),
    Case(
        "csv with semicolons, of no format",
        csv("a;b", header="x;y"),
        "train.csv: the columns fit no format. Found: x, y",
    ),
    Case("tabs under the name .csv", csv("a\tb", header="instruction\toutput"), kept=1),
    Case("Excel's first line, sep=;", file("train.csv", "\ufeffsep=;\r\ninstruction;output\r\na;b\r\n"), kept=1),
    Case("a header alone", csv(), "train.csv: the file has a header (instruction, output) but no rows"),
    Case(
        "a header that names a column twice", csv("a,b,c", header="instruction,output,output"), "train.csv, line 1"
    ),
    Case("an index of pandas, without a name", csv("0,a,b", header=",instruction,output"), kept=1),
    Case("a header with a hole", csv("x,a,b", header=",instruction,output"), "train.csv, line 1: column 1 of"),
    Case("columns and rows that hold nothing", csv("a,b,,", ",,,", header="instruction,output,,"), kept=1),
    Case(
        "two files joined", csv("a,b", "\ufeffinstruction,output", "c,d"), "train.csv, line 3, row 2: the header"
    ),
    Case("line ends of an old Mac", file("train.csv", GOOD.replace("\n", "\r")), kept=1),
    Case(
        "line ends of all kinds, blank lines", file("train.csv", "instruction,output\r\n\na,b\r\n\n\nc,d"), kept=2
    ),
    Case(
        "csv with quotes and line breaks in cells",
        csv('"a ""b""\nc","d,\r\ne"'),
        kept=1,
        noted={1: "carriage returns"},
    ),
    Case(
        "json cut short", file("train.json", '[{"instruction": "a", "output": "b"},\n{"in'), "train.json, line 2"
    ),
    Case(
        "json with a comma too many",
        file("train.json", '[{"instruction": "a"},]'),
        "train.json, line 1: malformed",
    ),
    Case("json with single quotes", file("train.json", "[{'instruction': 'a'}]"), "train.json, line 1: malformed"),
    Case("json with comments", file("train.json", "[ // rows\n{}]"), "train.json, line 1: malformed"),
    Case("json objects without commas", file("train.json", json.dumps(pair()) * 2), kept=2),
    Case(
        "json column by column", file("train.json", json.dumps({k: {"0": v} for k, v in pair().items()})), kept=1
    ),
    Case("json of bare lists of turns", file("train.json", json.dumps([turns("ua"), turns("ua")])), kept=2),
    Case(
        "json with a key twice",
        file("train.json", '[{"a": 1,\n"a": 2}]'),
        "train.json, line 2: the key 'a' is in one object twice",
    ),
    Case(
        "json with several lists", file("train.json", '{"x": [{}], "y": [{}]}'), "train.json: the object contains"
    ),
    Case(
        "json that is a list of texts", file("train.json", '["a", "b"]'), "train.json, row 1: expected an object"
    ),
    Case("json that is one text", file("train.json", '"a"'), "train.json: expected a list of objects"),
    Case(
        "json nested 100,000 deep", file("train.json", "[" * 100_000), "train.json, line 1: the JSON is nested too"
    ),
    Case(
        "json nested 300 deep where nothing reads",
        jsonl(pair(), pair(id=nested(300))),
        "train.jsonl, row 2: the value is nested",
    ),
    Case(
        "a number of 5,000 digits", file("train.jsonl", f'{{"a": {"9" * 5000}}}'), "train.jsonl, line 1: the JSON"
    ),
    Case("jsonl cut short", file("train.jsonl", '{"a": 1}\n{"a": '), "train.jsonl, line 2: malformed JSON"),
    Case("jsonl that is a list", file("train.jsonl", json.dumps([pair(), pair()])), kept=2),
    Case("jsonl with objects over several lines", file("train.jsonl", json.dumps(pair(), indent=1) * 2), kept=2),
    Case("jsonl with a bare value", jsonl(pair(), 5), "train.jsonl, line 2, row 2: expected an object"),
    Case(
        "jsonl with line separators in texts",
        file("train.jsonl", json.dumps(pair("a\u2028b"), ensure_ascii=False)),
        kept=1,
    ),
    Case("parquet cut short", half_a_parquet_file, "train.parquet: this is not a complete parquet file"),
    Case(
        "parquet of other bytes", file("train.parquet", b"PAR1" + bytes(range(256))), "train.parquet: this is no"
    ),
    Case("parquet under the name .csv", file("train.csv", b"PAR1...."), "train.csv: this is a parquet file"),
    Case(
        "csv under the name .parquet",
        file("train.parquet", GOOD),
        "train.parquet: this is not a complete parquet file",
    ),
    Case("a gzip file", file("train.jsonl", gzip.compress(b"{}")), "train.jsonl: this is a gzip file"),
    Case("a zip file", file("train.csv", zipped()), "train.csv: this is a zip archive"),
    Case(
        "a Git LFS pointer",
        file("train.parquet", "version https://git-lfs.github.com/spec/v1\n"),
        "train.parquet:",
    ),
    Case("a suffix that nobody knows", file("train.doc", GOOD), "train.doc: the suffix .doc is not one of"),
]

ENCODINGS = [
    Case("UTF-8 with a byte order mark", file("train.csv", "\ufeff" + GOOD), kept=1),
    Case("UTF-16", file("train.csv", GOOD.encode("utf-16")), kept=1),
    Case("UTF-32", file("train.jsonl", json.dumps(pair()).encode("utf-32")), kept=1),
    Case(
        "UTF-16 without a mark", file("train.csv", GOOD.encode("utf-16-le")), "train.csv, line 1: there is a NUL"
    ),
    Case("UTF-16 cut inside of a character", file("train.csv", GOOD.encode("utf-16")[:-1]), "train.csv, line 2"),
    Case("Latin-1", file("train.csv", "instruction,output\na,b\ncafé,d\n".encode("latin-1")), "train.csv, line 3"),
    Case("Shift-JIS", file("train.csv", "instruction,output\n猫,犬\n".encode("shift-jis")), "train.csv, line 2"),
    Case(
        "a bad byte in row 50,000",
        file("train.csv", (GOOD + "a,b\n" * 49_998).encode() + b"\xff,b\n"),
        "train.csv, line 50001: the byte 0xFF",
    ),
    Case("NUL bytes in csv", csv("a,b", "c\0,d"), "train.csv, line 3: there is a NUL character"),
    Case(
        "NUL bytes in jsonl", file("train.jsonl", json.dumps(pair()) + "\n\0\0\0"), "train.jsonl, line 2: there is"
    ),
    Case("NUL as JSON writes it", jsonl(pair("a\0b", "c\0d")), kept=1),
    Case(
        "mojibake",
        csv("naïve,fine", "cafÃ©,donâ€™t", "ÐŸÑ€Ð¸Ð²ÐµÑ‚,x"),
        kept=3,
        noted=dict.fromkeys((2, 3), "mojibake (UTF-8 that was read as another encoding)"),
    ),
    Case(
        "accents, quotes and scripts that are no mojibake",
        csv("l’été à «TANTÔ»,Ângström ½ ©", "你好,Привет"),
        kept=2,
    ),
    Case("characters lost to U+FFFD", csv("caf\ufffd,b"), kept=1, noted={1: "lost characters (U+FFFD)"}),
    Case("half a surrogate pair in a text", jsonl(pair("a\ud800"), pair()), kept=1, dropped={1: "broken Unicode"}),
    Case("half a surrogate pair in a column's name", jsonl(pair(**{"\ud800": 1})), kept=1),
    Case("escape codes of terminals", jsonl(pair("\x1b[2J\x1b]0;x\x07", "\x9b31m", **{"\x1b[31m": 1})), kept=1),
    Case(
        "directions, joiners, a storm of accents",
        csv("\u202ea\u200d\u2066b,e" + "\u0301" * 5000),
        kept=1,
        truncated=(1,),
    ),
]

SIZES = [
    Case("a csv cell of 100 MB", lambda: csv("a," + "word " * (LARGE // 5), "c,d")(), kept=2, truncated=(1,)),
    Case(
        "a jsonl text of 100 MB",
        lambda: jsonl(pair("a" * LARGE, "b"), pair())(),
        kept=1,
        dropped={1: "nothing to train on is left within max_length"},
        truncated=(1,),
    ),
    Case(
        "a parquet text of 100 MB",
        parquet(lambda: pa.table({"instruction": ["a"], "output": ["é " * (LARGE // 3)]})),
        kept=1,
        truncated=(1,),
    ),
    Case("300,000 columns", columns("a,b", ",instruction,output"), kept=1),
    Case(
        "300,000 columns that no format has",
        columns("x"),
        "train.csv: the columns fit no format. Found: 0, 1, 2",
    ),
    Case(
        "300,000 columns of one name",
        lambda: csv("," * (WIDE - 1), header=",".join(["a"] * WIDE))(),
        "train.csv, line 1",
    ),
    Case("300,000 keys in a row", lambda: jsonl(pair(**{str(i): None for i in range(WIDE)}))(), kept=1),
    Case("a million blank lines", lambda: file("train.csv", GOOD + "\n" * MANY)(), kept=1),
    Case(
        "a column's name of a million characters",
        lambda: csv("a,b,c", header=f"instruction,output,{'x' * MANY}")(),
        kept=1,
    ),
    Case(
        "a conversation of 20,000 turns",
        lambda: chats(turns("ua" * 10_000), turns("ua"))(),
        kept=2,
        truncated=(1,),
        noted={1: "cut off after 1000 messages"},
    ),
    Case("a file of a terabyte that is a hole", hole_of_a_terabyte, "train.csv: the file has 1100 GB"),
]

NO_FILES = [
    Case(
        "a link to itself",
        made(link("train.csv", "train.csv"), name="train.csv"),
        "train.csv: it is a link to train.csv, which leads back to itself",
    ),
    Case(
        "links in a ring",
        made(link("a.csv", "b.csv"), link("b.csv", "a.csv"), name="a.csv"),
        "a.csv: it is a link to b.csv, which leads back to itself",
    ),
    Case(
        "a link to nothing",
        made(link("train.csv", "gone.csv"), name="train.csv"),
        "train.csv: it is a link to gone.csv, which does not exist",
    ),
    Case(
        "a file under a link to itself",
        made(link("d", "d"), name="d/train.csv"),
        "d: it is a link to d, which leads",
    ),
    Case("a pipe", made(fifo("train.csv"), name="train.csv"), "train.csv: expected a regular file"),
    Case("a pipe in a folder", made(fifo("d/train.csv"), name="d"), "d/train.csv: expected a regular file"),
    Case("a socket", listening_socket, "train.csv: expected a regular file, found a device, a pipe or a socket"),
    Case("/dev/zero", lambda: "/dev/zero", "/dev/zero: expected a regular file, found a device"),
    Case(
        "a link to /dev/zero",
        made(link("train.csv", "/dev/zero"), name="train.csv"),
        "train.csv: expected a regular",
    ),
    Case(
        "a link to a file of /proc",
        made(link("train.csv", "/proc/version"), name="train.csv"),
        "train.csv: the file is",
    ),
    Case(
        "a folder that holds itself",
        made(link("d/d", "."), link("d/train", "../d"), name="d"),
        "d: expected files ending in .csv",
    ),
    Case(
        "a folder that holds itself under a file's name",
        made(file("d/a.csv", GOOD), link("d/b.csv", "."), name="d"),
        kept=1,
    ),
    Case(
        "a folder with a link that leaves it",
        made(file("x.csv", GOOD), link("d/a.csv", "../x.csv"), name="d"),
        "d/a.csv: it is a link to",
    ),
    Case(
        "a folder whose train/ leaves it",
        made(file("x/x.csv", GOOD), link("d/train", "../x"), name="d"),
        "d/train/x.csv: it is a link to",
    ),
    Case(
        "a folder with a link inside",
        made(file("d/other/x.csv", GOOD), link("d/a.csv", "other/x.csv"), name="d"),
        kept=1,
    ),
    Case(
        "a folder of the hub's cache",
        made(file("blobs/x", GOOD), link("snapshots/1/a.csv", "../../blobs/x"), name="snapshots/1"),
        kept=1,
    ),
    Case(
        "a path that leaves the working folder and comes back",
        made(file("d/train.csv", GOOD), name="d/../d/train.csv"),
        kept=1,
    ),
    Case(
        "test rows next to training rows",
        made(file("d/train.csv", GOOD), file("d/test.csv", GOOD), name="d"),
        "d: this folder contains both training files and test files",
    ),
    Case("an empty folder", made(lambda: Path("d").mkdir(), name="d"), "d: expected files ending in .csv"),
    Case("a name that is no UTF-8", file("caf\udce9.csv", GOOD), kept=1),
    Case(
        "a name with a line break and an escape code",
        file("a\n\x1b[31m.csv", "instruction\n"),
        r"a\n\x1b[31m.csv: the file has a header",
    ),
    Case("a name of 5,000 characters", lambda: "x" * 5000, "--data is 'xxxxx"),
    Case(
        "the home of a user who is not there",
        lambda: "~nobody-of-this-name/train.csv",
        "~nobody-of-this-name/train",
    ),
    Case("no name", lambda: " ", "' ' names no data"),
]
