"""Train the bundled tokenizer on the bundled text: python examples/train_tokenizer.py --out my_tokenizer"""

import argparse

from bridges.data.corpus import bundled_documents
from bridges.data.tokenizer import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bridges/assets/tokenizer", help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--split", default="train", help='"heldout" is a twentieth of the text, for a quick try')
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = train_tokenizer(bundled_documents(args.split, args.seed), args.vocab_size)
    tokenizer.save_pretrained(args.out)
    for string in ("('", '("', "')", '")'):
        print(string, tokenizer.convert_ids_to_tokens(tokenizer.encode(string)))


if __name__ == "__main__":
    main()
