// What two answers share, and where they differ.

const MOST_CELLS = 4_000_000; // of the table: answers of 2,000 tokens with nothing in common

/**
 * Return where two lists differ: {parts, a, b}.
 *
 * parts: index of the first difference, or null if there is none. a, b: for each item, whether it belongs to a longest
 * common subsequence of both.
 */
export function align(first, second) {
  let start = 0;
  while (start < first.length && start < second.length && first[start] === second[start]) start++;
  if (start === first.length && start === second.length) {
    return { parts: null, a: first.map(() => true), b: second.map(() => true) };
  }
  let [ends, endOfSecond] = [first.length, second.length];
  while (ends > start && endOfSecond > start && first[ends - 1] === second[endOfSecond - 1]) ends--, endOfSecond--;
  const a = first.map((_, index) => index < start || index >= ends);
  const b = second.map((_, index) => index < start || index >= endOfSecond);
  for (const [i, j] of shared(first.slice(start, ends), second.slice(start, endOfSecond))) {
    a[start + i] = b[start + j] = true;
  }
  return { parts: start, a, b };
}

/** Return the pairs of indices of a longest common subsequence; none if the lists are too long for it. */
function shared(first, second) {
  const width = second.length + 1;
  if ((first.length + 1) * width > MOST_CELLS) return [];
  const lengths = new Uint16Array((first.length + 1) * width); // of what the rests from (i, j) on share
  for (let i = first.length - 1; i >= 0; i--) {
    for (let j = second.length - 1; j >= 0; j--) {
      lengths[i * width + j] =
        first[i] === second[j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const pairs = [];
  for (let i = 0, j = 0; i < first.length && j < second.length; ) {
    if (first[i] === second[j]) pairs.push([i++, j++]);
    else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i++;
    else j++;
  }
  return pairs;
}

/** Return a text's words, the space between them, and signs. Joined they are the text. */
export function wordsOf(text) {
  return text.match(/\s+|[\p{L}\p{M}\p{N}]+|[^\s\p{L}\p{M}\p{N}]/gu) ?? [];
}
