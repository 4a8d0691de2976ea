"""The unit names that are recognized, each with pint's name for it.

Only these reach pint. Symbols are case-sensitive, names are not; plurals count as names.
"""

from __future__ import annotations

PREFIXES = {
    "n": "nano",
    "u": "micro",
    "μ": "micro",
    "m": "milli",
    "c": "centi",
    "d": "deci",
    "k": "kilo",
    "M": "mega",
    "G": "giga",
    "T": "tera",
}
# symbol: (pint's name, prefixes that it takes)
PREFIXED_SYMBOLS = {
    "m": ("meter", "nuμmcdk"),
    "g": ("gram", "nuμmckM"),
    "s": ("second", "nuμm"),
    "L": ("liter", "uμmcd"),
    "l": ("liter", "uμmcd"),
    "A": ("ampere", "nuμmk"),
    "K": ("kelvin", "m"),
    "mol": ("mole", "nuμmk"),
    "cd": ("candela", "m"),
    "Hz": ("hertz", "mkMGT"),
    "N": ("newton", "mkM"),
    "Pa": ("pascal", "mkMG"),
    "J": ("joule", "mkMG"),
    "W": ("watt", "nuμmkMGT"),
    "Wh": ("watt_hour", "mkMGT"),
    "C": ("coulomb", "nuμm"),
    "V": ("volt", "nuμmkM"),
    "F": ("farad", "nuμm"),
    "Ω": ("ohm", "mkM"),
    "S": ("siemens", "uμm"),
    "T": ("tesla", "nuμm"),
    "Wb": ("weber", "m"),
    "H": ("henry", "nuμm"),
    "eV": ("electron_volt", "mkMGT"),
    "bar": ("bar", "m"),
    "cal": ("calorie", "k"),
    "B": ("byte", "kMGT"),
}
SYMBOLS = {
    "h": "hour",
    "hr": "hour",
    "hrs": "hour",
    "min": "minute",
    "mins": "minute",
    "sec": "second",
    "secs": "second",
    "yr": "year",
    "yrs": "year",
    "lm": "lumen",
    "lx": "lux",
    "Bq": "becquerel",
    "Gy": "gray",
    "Sv": "sievert",
    "in": "inch",
    "ft": "foot",
    "yd": "yard",
    "yds": "yard",
    "mi": "mile",
    "lb": "pound",
    "lbs": "pound",
    "oz": "ounce",
    "gal": "gallon",
    "qt": "quart",
    "tbsp": "tablespoon",
    "tsp": "teaspoon",
    "ha": "hectare",
    "mph": "mile_per_hour",
    "kph": "kilometer_per_hour",
    "kmh": "kilometer_per_hour",
    "psi": "pound_force_per_square_inch",
    "atm": "standard_atmosphere",
    "rpm": "revolutions_per_minute",
    "rad": "radian",
    "deg": "degree",
    "°": "degree",
    "%": "percent",
    "°C": "degree_Celsius",
    "°F": "degree_Fahrenheit",
    "°K": "kelvin",
    "Km": "kilometer",
    "KM": "kilometer",
    "Kg": "kilogram",
    "KG": "kilogram",
    "CM": "centimeter",
    "MM": "millimeter",
    "ML": "milliliter",
    "KB": "kilobyte",
}
LONG_PREFIXES = ("nano", "micro", "milli", "centi", "deci", "kilo", "mega", "giga", "tera")
PREFIXED_NAMES = {
    "meter": "meter",
    "metre": "meter",
    "gram": "gram",
    "second": "second",
    "liter": "liter",
    "litre": "liter",
    "ampere": "ampere",
    "amp": "ampere",
    "mole": "mole",
    "newton": "newton",
    "pascal": "pascal",
    "joule": "joule",
    "watt": "watt",
    "volt": "volt",
    "ohm": "ohm",
    "calorie": "calorie",
    "bit": "bit",
    "byte": "byte",
}
NAMES = {
    "kelvin": "kelvin",
    "hertz": "hertz",
    "kilohertz": "kilohertz",
    "megahertz": "megahertz",
    "gigahertz": "gigahertz",
    "coulomb": "coulomb",
    "farad": "farad",
    "siemens": "siemens",
    "tesla": "tesla",
    "weber": "weber",
    "henry": "henry",
    "lumen": "lumen",
    "lux": "lux",
    "candela": "candela",
    "electronvolt": "electron_volt",
    "minute": "minute",
    "hour": "hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year",
    "century": "century",
    "inch": "inch",
    "foot": "foot",
    "yard": "yard",
    "mile": "mile",
    "acre": "acre",
    "hectare": "hectare",
    "pound": "pound",
    "ounce": "ounce",
    "ton": "ton",
    "tonne": "metric_ton",
    "gallon": "gallon",
    "quart": "quart",
    "pint": "pint",
    "cup": "cup",
    "tablespoon": "tablespoon",
    "teaspoon": "teaspoon",
    "knot": "knot",
    "atmosphere": "standard_atmosphere",
    "horsepower": "horsepower",
    "radian": "radian",
    "degree": "degree",
    "percent": "percent",
    "celsius": "degree_Celsius",
    "fahrenheit": "degree_Fahrenheit",
}
IRREGULAR_PLURALS = {
    "feet": "foot",
    "inches": "inch",
    "centuries": "century",
    "henries": "henry",
}


def symbols() -> dict[str, str]:
    """Every symbol, prefixed and not."""
    table = dict(SYMBOLS)
    for symbol, (name, prefixes) in PREFIXED_SYMBOLS.items():
        table[symbol] = name
        for prefix in prefixes:
            table.setdefault(prefix + symbol, PREFIXES[prefix] + name)
    return table


def names() -> dict[str, str]:
    """Every name in small letters, with plurals."""
    table = dict(NAMES)
    for name, canonical in PREFIXED_NAMES.items():
        table[name] = canonical
        for prefix in LONG_PREFIXES:
            table[prefix + name] = prefix + canonical
    table |= {f"{name}s": canonical for name, canonical in table.items()}
    return table | IRREGULAR_PLURALS


SYMBOL_TABLE = symbols()
NAME_TABLE = names()
KNOWN = frozenset(SYMBOL_TABLE.values()) | frozenset(NAME_TABLE.values())
# Measured from a zero of their own, so without powers or products.
OFFSET = frozenset({"degree_Celsius", "degree_Fahrenheit"})


def lookup(word: str) -> str | None:
    """pint's name for a unit as it is written; ``None`` where it is a word like any other."""
    return SYMBOL_TABLE.get(word) or NAME_TABLE.get(word.lower())
