const CURATED = DATA.curated;

function showCurated() {
  const hint = byId('curation-hint');
  if (!CURATED) {
    hint.append(
      'Not looked for yet: ',
      el('code', { text: 'cmd-jax curate --workdir=RUN' }),
      ' finds duplicates, outliers, labels that look wrong and what to ' +
        'label first, and this page shows them when it is made again.',
    );
    return;
  }
  hint.append(
    'Found by the encoder among the images of ',
    el('a', { href: 'curated/curate.html', text: 'this page' }),
    ', where they can be looked at. Nothing was changed.',
  );
  byId('curation-cards').append(
    ...Object.entries(CURATED.counts).map(([name, count]) =>
      card(name, grouped(count))),
  );
  if (!CURATED.suspects.length) return;
  const heads = ['Label to look at again', 'given', 'suggested'];
  byId('suspects').append(
    el(
      'table',
      {},
      el('thead', {}, el('tr', {}, ...heads.map((text) =>
        el('th', { scope: 'col', text })))),
      el('tbody', {}, ...CURATED.suspects.map((row) =>
        el(
          'tr',
          {},
          el('th', { scope: 'row' }, el('code', { text: row.file })),
          el('td', { text: row.given }),
          el('td', { text: row.suggested }),
        ))),
    ),
  );
}
