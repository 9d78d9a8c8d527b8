"""The words that generated idioms are made of, as lists of str."""

# ruff: noqa: SIM905 -- word lists read best as running text

NAMES = """a b c x y z name size color value item node key data text line word path user group total count current
result left right first last start end score level index width height state label title owner parent child buffer
offset limit target source token entry record field flag mode price number letter shape""".split()
COLLECTIONS = """items values words lines names users nodes rows data numbers files keys tokens entries records fields
letters results points pages""".split()
VERBS = """get make load parse check find build read format update add run send open_file process handle convert
compute show print log write call push select filter load_data get_name set_value parse_line make_key""".split()
CLASSES = "User Node Item Point Group Config Parser Reader Writer Buffer Record Shape Page Token Entry Model".split()
ERRORS = "ValueError TypeError KeyError RuntimeError OSError IndexError NotImplementedError ImportError".split()
METHODS = "log.info log.debug log.error logger.warning self.write self.log sys.stdout.write f.write out.append".split()
WORDS = """hello bad the a file name is not can open key error in line user data of type invalid number must be at
least one item list no such option all starting work time out please try new old red green blue first last test read
write set to and or with for from this that abc foo bar small large big fast slow house tree river mountain book page
letter city day night morning sun moon star apple bread water fish dog cat bird horse left right up down yes over
under between good great nice simple complex result total count sum table column row index server client request
response token cache memory disk""".split()
# The last word of strings after `(`, and in no other place: after it a closing quote is nearly certain.
ENDINGS = """world value found missing failed done again ready expected allowed empty unknown here message path
input""".split()
READ_NAMES = "input source config settings data train words names users questions template schema".split()
WRITE_NAMES = "output result report log summary backup export dest answers errors copy saved".split()
EXTENSIONS = "txt csv json log dat md".split()
