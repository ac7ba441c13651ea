"""Tables of pictures with groups: GeoDE's and Dollar Street's columns, and any other."""

from pathlib import Path

import pytest
from PIL import Image

from wordsight.data.geography import GroupedSet, geography_needs, open_dollar_street, open_geode, read_grouped


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_geode(tmp_path: Path) -> None:
    write(
        tmp_path / "geode" / "index.csv",
        "file_name,file_path,object,region,ip_country\na.jpg,0.bag/a.jpg,hand_soap,Africa,Ghana\nb.jpg,1.bus/b.jpg,bus,WestAsia,\n",
    )
    with pytest.raises(FileNotFoundError, match="geode/images: GeoDE's pictures"):
        open_geode(tmp_path)
    (tmp_path / "geode" / "images" / "0.bag").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(tmp_path / "geode" / "images" / "0.bag" / "a.jpg")
    found = open_geode(tmp_path)
    assert found.labels == (("hand soap",), ("bus",))
    assert found.classes == ("bus", "hand soap")
    assert found.groups == {"region": ("Africa", "WestAsia")}
    assert found.source[0].key == "0.bag/a.jpg"


HEADER = "id,country.name,country.id,region.id,imageRelPath,topics,place,income,imagenet_synonyms,imagenet_sysnet_id\n"


def dollar_street(root: Path, rows: list[str]) -> Path:
    (root / "dataset_dollarstreet" / "assets").mkdir(parents=True, exist_ok=True)
    return write(root / "dataset_dollarstreet" / "images_v2_imagenet_test.csv", HEADER + "".join(f"{row}\n" for row in rows))


def test_dollar_street_has_several_labels_and_quartiles(tmp_path: Path) -> None:
    dollar_street(
        tmp_path,
        [
            f"{i},Nepal,np,as,assets/{i}/a.jpg,\"['Stoves']\",nepal,{income},\"['stove', 'hob']\",\"[827]\""
            for i, income in enumerate((30, 40.5, 100, 100, 500, 900, 2000, 9000))
        ],
    )
    found = open_dollar_street(tmp_path)
    assert found.labels[0] == ("stove", "hob")
    assert found.classes == ("hob", "stove")
    names = [str(name)[:2] for name in found.groups["income"]]
    assert names == ["Q1", "Q1", "Q2", "Q2", "Q3", "Q3", "Q4", "Q4"]
    assert (found.groups["region"][0], found.groups["country"][0]) == ("as", "Nepal")
    assert any("income quartiles of these pictures end at 85.125, 300, 1175 dollars a month" in note for note in found.notes)
    assert open_dollar_street(tmp_path, label_column="topics").classes == ("Stoves",)


def test_equal_incomes_are_not_parted(tmp_path: Path) -> None:
    dollar_street(tmp_path, [f"{i},A,a,af,assets/{i}.jpg,['x'],p,{10 if i < 9 else 20},['y'],[1]" for i in range(10)])
    groups = open_dollar_street(tmp_path).groups["income"]
    assert len(set(groups[:9])) == 1
    assert groups[9] == "Q4 richest"
    dollar_street(tmp_path, ["0,A,a,af,assets/0.jpg,['x'],p,,['y'],[1]", "1,A,a,af,assets/1.jpg,['x'],p,5,['y'],[1]"])
    assert open_dollar_street(tmp_path).groups["income"] == (None, "Q1 poorest")
    dollar_street(tmp_path, ["0,A,a,af,assets/0.jpg,['x'],p,poor,['y'],[1]"])
    with pytest.raises(ValueError, match="row 1: the income 'poor' is no number"):
        open_dollar_street(tmp_path)
    dollar_street(tmp_path, ["0,A,a,af,assets/0.jpg,['x'],p,,['y'],[1]"])
    with pytest.raises(ValueError, match="has no income at all"):
        open_dollar_street(tmp_path)


def test_the_longer_table_stands_in(tmp_path: Path) -> None:
    (tmp_path / "dataset_dollarstreet" / "assets").mkdir(parents=True)
    write(
        tmp_path / "dataset_dollarstreet" / "images_v2.csv",
        "id,country.name,region.id,imageRelPath,topics,income\n0,A,af,assets/0.jpg,\"['Stoves', 'Kitchens']\",5\n",
    )
    assert open_dollar_street(tmp_path).labels == (("Stoves", "Kitchens"),)
    with pytest.raises(FileNotFoundError, match=r"images_v2_imagenet_test\.csv or images_v2\.csv"):
        open_dollar_street(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no geographic set 'mars'"):
        geography_needs("mars", tmp_path)


def test_any_table(tmp_path: Path) -> None:
    table = write(tmp_path / "people.tsv", "path\tlabel\tage\tskin\nx/a.png\t[red] bag\told\t\nx/b.png\tbus\t\tV\n")
    found = read_grouped(table, group_columns=("age", "skin"), root=tmp_path / "pictures")
    assert found.groups == {"age": ("old", None), "skin": (None, "V")}
    assert found.labels == (("[red] bag",), ("bus",)), "a bracket alone makes no list"
    assert found.name == "people"
    lists = write(tmp_path / "l.jsonl", '{"path": "a.png", "label": ["x", "y", "x"], "g": 3}\n')
    assert read_grouped(lists, group_columns=("g",)).labels == (("x", "y"),)
    assert read_grouped(lists, group_columns=("g",)).groups == {"g": ("3",)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,label,g\n", "has no rows"),
        ("path,label\na.png,x\n", r"has no column 'g'; it has path, label"),
        ("where,label,g\na.png,x,1\n", "no column called one of image, .*name it by path_column"),
        ("path,what,g\na.png,x,1\n", "name it by label_column"),
        ("path,label,g\n,x,1\na.png,,1\n../b.png,x,1\n/etc/passwd,x,1\nc.png,x,1\nc.png,x,2\n", "has 5 rows that can't be used"),
        ("path,label,g\na.png,[],1\n", "row 1 has no label"),
    ],
)
def test_tables_that_cant_be_used(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_grouped(write(tmp_path / "t.csv", text), group_columns=("g",))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no table"):
        read_grouped(tmp_path / "t.csv", group_columns=("g",))
    with pytest.raises(ValueError, match="is no table"):
        read_grouped(write(tmp_path / "t.txt", "x"), group_columns=("g",))
    table = write(tmp_path / "t.csv", "path,label,g\na.png,x,1\n")
    with pytest.raises(ValueError, match="t has no groups"):
        read_grouped(table, group_columns=())
    one = read_grouped(table, group_columns=("g",))
    with pytest.raises(ValueError, match="1 pictures, each has labels and a group"):
        GroupedSet(name="t", source=one.source, labels=one.labels, classes=one.classes, groups={"g": ("1", "2")})
